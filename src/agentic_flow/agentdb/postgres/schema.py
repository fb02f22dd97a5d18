"""Tables of an AgentDB in PostgreSQL, and the explicit migrations that make them.

All of it lives in the schema `agentic_flow`. Tables carry the tenant, and row-level security admits a row
only when the transaction's `agentic_flow.tenant` names it. The store works as the role `agentic_flow_app`,
which owns nothing and cannot bypass that wall, whatever role the URL logs in as.

`items` is partitioned by `shard`: 0 is shared by the small namespaces, a large one has a partition (and a
graph index) of its own, whose shard is the namespace's id. Why: docs/decisions/0012-postgres-layout.md.
"""

from __future__ import annotations

import re
from typing import LiteralString, NamedTuple

from psycopg import AsyncConnection, errors

from agentic_flow.agentdb.postgres.connections import APP_ROLE, connect
from agentic_flow.core.errors import Conflict, Forbidden, NeedsNewer, Unavailable

MIGRATE_COMMAND = "agentic-flow db migrate-schema"
PGVECTOR_MIN = (0, 8, 0)
"""The first version with iterative index scans, without which filters lose recall."""

_LOCK = 0x61676E74_666C6F77
"""Key of the advisory lock that migrations take: one process migrates, the others wait and find it done."""


class Migration(NamedTuple):
    name: str
    sql: LiteralString


_TABLES = """
CREATE TABLE agentic_flow.namespaces (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    tenant text COLLATE "C" NOT NULL,
    name text COLLATE "C" NOT NULL,
    dimension integer NOT NULL,
    metric text NOT NULL,
    embedder_id text NOT NULL,
    quantization text NOT NULL,
    callers_vectors boolean NOT NULL,
    created_at_s double precision NOT NULL,
    shard bigint NOT NULL DEFAULT 0,
    UNIQUE (tenant, name)
);

CREATE TABLE agentic_flow.documents (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    tenant text COLLATE "C" NOT NULL,
    namespace_id bigint NOT NULL REFERENCES agentic_flow.namespaces (id),
    path_key text COLLATE "C" NOT NULL,
    long_path text COLLATE "C",
    size_bytes bigint NOT NULL,
    mtime_ns bigint NOT NULL,
    sha256 text NOT NULL,
    word_count bigint NOT NULL DEFAULT 0,
    updated_at_s double precision NOT NULL,
    UNIQUE (namespace_id, path_key)
);

CREATE SEQUENCE agentic_flow.item_keys;

-- `metadata` is the JSON as it came; `fields` is what filters compare: its scalars, encoded so that
-- PostgreSQL orders and stores them as filters mean, with `derived` beside (encoding.py). `words` maps each
-- stem to its weighted count.
CREATE TABLE agentic_flow.items (
    shard bigint NOT NULL,
    key bigint NOT NULL DEFAULT nextval('agentic_flow.item_keys'),
    tenant text COLLATE "C" NOT NULL,
    namespace_id bigint NOT NULL,
    document_id bigint,
    id text COLLATE "C" NOT NULL,
    version bigint NOT NULL,
    word_count bigint NOT NULL,
    created_at_s double precision NOT NULL,
    updated_at_s double precision NOT NULL,
    expires_at_s double precision,
    valid_from_s double precision,
    valid_until_s double precision,
    fields jsonb NOT NULL,
    derived jsonb,
    metadata text NOT NULL,
    text text NOT NULL,
    long_id text COLLATE "C",
    words jsonb NOT NULL,
    wide vector,
    half halfvec,
    CHECK ((wide IS NULL) <> (half IS NULL)),
    PRIMARY KEY (shard, key)
) PARTITION BY LIST (shard);
CREATE UNIQUE INDEX items_by_id ON agentic_flow.items (shard, namespace_id, id) INCLUDE (word_count);
CREATE INDEX items_by_document ON agentic_flow.items (document_id) WHERE document_id IS NOT NULL;
CREATE INDEX items_by_expiry ON agentic_flow.items (namespace_id, expires_at_s)
    WHERE expires_at_s IS NOT NULL;
CREATE TABLE agentic_flow.items_shared PARTITION OF agentic_flow.items FOR VALUES IN (0);

-- One row a committed call.
CREATE TABLE agentic_flow.operations (
    sequence bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    tenant text COLLATE "C" NOT NULL,
    namespace_id bigint NOT NULL,
    kind text NOT NULL,
    keys bigint[] NOT NULL,
    at_s double precision NOT NULL
);
CREATE INDEX operations_by_namespace ON agentic_flow.operations (namespace_id, sequence);

CREATE TABLE agentic_flow.idempotency (
    tenant text COLLATE "C" NOT NULL,
    namespace_id bigint NOT NULL,
    key text COLLATE "C" NOT NULL,
    request_sha256 text NOT NULL,
    response text NOT NULL,
    at_s double precision NOT NULL,
    PRIMARY KEY (namespace_id, key)
);
"""

# The wall. `(SELECT …)` makes PostgreSQL read the setting once a statement instead of once a row. The owner
# of the functions below sees everything; they narrow down to the tenant themselves.
_WALL = """
DO $do$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY['namespaces', 'documents', 'items', 'operations', 'idempotency'] LOOP
        EXECUTE format('ALTER TABLE agentic_flow.%I ENABLE ROW LEVEL SECURITY', name);
        EXECUTE format('ALTER TABLE agentic_flow.%I FORCE ROW LEVEL SECURITY', name);
        EXECUTE format($policy$
            CREATE POLICY tenant_wall ON agentic_flow.%I
            USING (tenant = (SELECT current_setting('agentic_flow.tenant', true)))
            WITH CHECK (tenant = (SELECT current_setting('agentic_flow.tenant', true)))
        $policy$, name);
        EXECUTE format('CREATE POLICY owner ON agentic_flow.%I TO %I USING (true) WITH CHECK (true)',
            name, current_user);
        EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON agentic_flow.%I TO agentic_flow_app', name);
    END LOOP;
END
$do$;
-- Partitions are reached through `items`; by themselves they show nothing to anybody but the owner.
ALTER TABLE agentic_flow.items_shared ENABLE ROW LEVEL SECURITY;
-- Who keeps the whole store needs the names of its tenants, and nothing else of them. * is no tenant's name.
CREATE POLICY operator ON agentic_flow.namespaces FOR SELECT
    USING ((SELECT current_setting('agentic_flow.tenant', true)) = '*');
GRANT USAGE ON SCHEMA agentic_flow TO agentic_flow_app;
GRANT USAGE ON ALL SEQUENCES IN SCHEMA agentic_flow TO agentic_flow_app;
GRANT SELECT ON agentic_flow.migrations TO agentic_flow_app;
"""

# Full text. PostgreSQL has no BM25, and row-level security keeps indexes over `@@` or `&&` from being used,
# because those operators are not leakproof. Hence a function of the owner, which compares the tenant itself.
_TEXT = """
CREATE TEXT SEARCH DICTIONARY agentic_flow.porter (TEMPLATE = pg_catalog.snowball, LANGUAGE = porter);

CREATE FUNCTION agentic_flow.stem(word text) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $body$
    SELECT coalesce((ts_lexize('agentic_flow.porter'::regdictionary, word))[1], word)
$body$;

CREATE FUNCTION agentic_flow.stemmed(counts jsonb) RETURNS jsonb
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $body$
    SELECT coalesce(jsonb_object_agg(stem, weight), '{}') FROM (
        SELECT agentic_flow.stem(key) AS stem, sum(value::bigint) AS weight
        FROM jsonb_each_text(counts) GROUP BY 1
    ) AS stems
$body$;

-- Entries of the full-text index: a stem together with its namespace, so that no search reads the postings of
-- another one.
CREATE FUNCTION agentic_flow.postings(namespace_id bigint, stems text[]) RETURNS bigint[]
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $body$
    SELECT array_agg(hashtextextended(stem, namespace_id)) FROM unnest(stems) AS stem
$body$;

CREATE FUNCTION agentic_flow.postings(namespace_id bigint, words jsonb) RETURNS bigint[]
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $body$
    SELECT array_agg(hashtextextended(stem, namespace_id)) FROM jsonb_object_keys(words) AS stem
$body$;

CREATE INDEX items_by_word ON agentic_flow.items
    USING gin (agentic_flow.postings(namespace_id, words) array_ops);

-- BM25 (k1 = 1.2, b = .75, as FTS5 computes it) of every item that has a word, and of the document it is part
-- of, taken as one text. Expired items and those not valid at `at_s` have no part in it.
CREATE FUNCTION agentic_flow.text_search(
    in_shard bigint, in_namespace bigint, query_words text[], now_s double precision, at_s double precision,
    items_count double precision, words_average double precision,
    documents_count double precision, document_words_average double precision, best bigint
) RETURNS TABLE (
    item_key bigint, item_document bigint, item_score double precision, document_score double precision
)
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $body$
DECLARE
    stems text[] := ARRAY(SELECT DISTINCT agentic_flow.stem(word) FROM unnest(query_words) AS word);
    wanted bigint[] := agentic_flow.postings(in_namespace, stems);
    own_tenant text := current_setting('agentic_flow.tenant');
BEGIN
    RETURN QUERY
    WITH found AS MATERIALIZED (
        SELECT i.key, i.document_id, i.word_count, s.stem, (i.words -> s.stem)::double precision AS weight
        FROM agentic_flow.items AS i, unnest(stems) AS s (stem)
        WHERE i.shard = in_shard AND i.namespace_id = in_namespace AND i.tenant = own_tenant
        AND agentic_flow.postings(i.namespace_id, i.words) && wanted AND i.words ? s.stem
        AND (i.expires_at_s IS NULL OR i.expires_at_s > now_s)
        AND (i.valid_from_s IS NULL OR i.valid_from_s <= at_s)
        AND (i.valid_until_s IS NULL OR i.valid_until_s > at_s)
    ),
    rarity AS (
        SELECT f.stem,
            greatest(ln(greatest((items_count - count(*) + 0.5) / (count(*) + 0.5), 1e-9)), 1e-6) AS idf
        FROM found AS f GROUP BY f.stem
    ),
    scored AS (
        SELECT f.key, min(f.document_id) AS document_id,
            sum(r.idf * f.weight * 2.2 / (f.weight + 1.2 * (0.25 + 0.75 * f.word_count / words_average)))
            AS score
        FROM found AS f JOIN rarity AS r USING (stem) GROUP BY f.key
    ),
    in_documents AS (
        SELECT f.document_id, f.stem, sum(f.weight) AS weight
        FROM found AS f WHERE f.document_id IS NOT NULL GROUP BY f.document_id, f.stem
    ),
    document_rarity AS (
        SELECT d.stem,
            greatest(ln(greatest((documents_count - count(*) + 0.5) / (count(*) + 0.5), 1e-9)), 1e-6) AS idf
        FROM in_documents AS d GROUP BY d.stem
    ),
    whole AS (
        SELECT d.document_id, sum(r.idf * d.weight * 2.2 / (d.weight + 1.2 * (0.25 + 0.75
            * (SELECT o.word_count FROM agentic_flow.documents AS o WHERE o.id = d.document_id)
            / document_words_average))) AS score
        FROM in_documents AS d JOIN document_rarity AS r USING (stem) GROUP BY d.document_id
    )
    SELECT s.key, s.document_id, s.score, coalesce(w.score, 0)
    FROM scored AS s LEFT JOIN whole AS w USING (document_id)
    ORDER BY s.score DESC, s.key LIMIT best;
END
$body$;
"""

# Large namespaces. Both functions run as the owner, for the application role may not change tables.
_PARTITIONS = """
CREATE FUNCTION agentic_flow.promote(wanted_namespace bigint, index_type text, index_operators text)
RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET maintenance_work_mem = '256MB'
SET statement_timeout = 0
AS $body$
DECLARE
    own agentic_flow.namespaces;
    vectors text := quote_ident((
        SELECT n.nspname FROM pg_catalog.pg_extension AS e
        JOIN pg_catalog.pg_namespace AS n ON n.oid = e.extnamespace WHERE e.extname = 'vector'));
    partition text := format('items_n%s', wanted_namespace);
    part_columns text;
BEGIN
    -- The lock keeps writers of this namespace out; they continue in the new partition.
    SELECT * INTO own FROM agentic_flow.namespaces
        WHERE id = wanted_namespace AND tenant = current_setting('agentic_flow.tenant') FOR UPDATE;
    IF own.id IS NULL OR own.shard <> 0 THEN
        RETURN false;
    END IF;
    IF index_type NOT IN ('vector', 'halfvec')
        OR index_operators NOT IN ('cosine_ops', 'ip_ops', 'l2_ops') THEN
        RAISE EXCEPTION 'no such index: % %', index_type, index_operators;
    END IF;
    EXECUTE format('CREATE TABLE agentic_flow.%I (LIKE agentic_flow.items INCLUDING DEFAULTS '
        'INCLUDING CONSTRAINTS INCLUDING STORAGE, CHECK (shard = %s))', partition, own.id);
    SELECT string_agg(quote_ident(attname), ', ' ORDER BY attnum) INTO part_columns
        FROM pg_catalog.pg_attribute
        WHERE attrelid = 'agentic_flow.items'::regclass AND attnum > 0 AND NOT attisdropped
        AND attname <> 'shard';
    EXECUTE format('INSERT INTO agentic_flow.%I (shard, %s) SELECT %s, %s FROM agentic_flow.items_shared '
        'WHERE namespace_id = %s ORDER BY key', partition, part_columns, own.id, part_columns, own.id);
    EXECUTE format('CREATE INDEX %I ON agentic_flow.%I USING hnsw ((%I::%s.%s(%s)) %s.%s_%s) '
        'WITH (m = 16, ef_construction = 128)', partition || '_graph', partition,
        CASE index_type WHEN 'vector' THEN 'wide' ELSE 'half' END, vectors, index_type, own.dimension,
        vectors, index_type, index_operators);
    EXECUTE format('ALTER TABLE agentic_flow.%I ENABLE ROW LEVEL SECURITY', partition);
    EXECUTE format('ALTER TABLE agentic_flow.items ATTACH PARTITION agentic_flow.%I FOR VALUES IN (%s)',
        partition, own.id);
    DELETE FROM agentic_flow.items WHERE shard = 0 AND namespace_id = own.id;
    UPDATE agentic_flow.namespaces SET shard = own.id WHERE id = own.id;
    EXECUTE format('ANALYZE agentic_flow.%I', partition);
    RETURN true;
END
$body$;

-- Partitions of namespaces that were deleted. Their rows are gone already; this gives back the table.
CREATE FUNCTION agentic_flow.sweep() RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET lock_timeout = '1s'
AS $body$
DECLARE
    partition regclass;
    swept integer := 0;
BEGIN
    FOR partition IN
        SELECT c.oid FROM pg_catalog.pg_inherits AS h JOIN pg_catalog.pg_class AS c ON c.oid = h.inhrelid
        WHERE h.inhparent = 'agentic_flow.items'::regclass AND c.relname ~ '^items_n[0-9]+$'
        AND NOT EXISTS (SELECT 1 FROM agentic_flow.namespaces AS n
            WHERE format('items_n%s', n.shard) = c.relname)
    LOOP
        EXECUTE format('DROP TABLE %s', partition);
        swept := swept + 1;
    END LOOP;
    RETURN swept;
END
$body$;

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA agentic_flow FROM PUBLIC;
GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA agentic_flow TO agentic_flow_app;
"""

MIGRATIONS: tuple[Migration, ...] = (
    Migration("0001-tables", _TABLES),
    Migration("0002-row-level-security", _WALL),
    Migration("0003-full-text", _TEXT),
    Migration("0004-partitions", _PARTITIONS),
)
"""In order. Never edit one that shipped."""


async def migrate(url: str) -> list[str]:
    """Bring a database to this version's schema; several processes may ask at once.

    Args:
        url: `postgresql://…`, logging in as a role that may create the schema `agentic_flow`: the database's
            owner with CREATEROLE, or a superuser (which also installs pgvector where it is missing).

    Returns:
        Names of the migrations that were applied, in order; none when it was current.

    Raises:
        Conflict: the database was written by a newer version.
        Forbidden: the role may not do a step; the hint is what an administrator runs instead.
        Unavailable: it cannot be reached, or has no pgvector.
    """
    async with await connect(url) as connection:
        await connection.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
        await _install_pgvector(connection)
        await _make_app_role(connection)
        version = await read_version(connection)
        if version is None:
            await _allowed(
                connection,
                "CREATE SCHEMA agentic_flow; CREATE TABLE agentic_flow.migrations (version integer "
                "PRIMARY KEY, "
                "name text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now())",
                "GRANT CREATE ON DATABASE … TO …",
            )
        if version is not None:
            await check_version(connection, allow_older=True)
        applied: list[str] = []
        for number, migration in enumerate(MIGRATIONS[version or 0 :], (version or 0) + 1):
            await connection.execute(migration.sql)
            await connection.execute(
                "INSERT INTO agentic_flow.migrations (version, name) VALUES (%s, %s)",
                (number, migration.name),
            )
            applied.append(migration.name)
        return applied


async def schema_version(url: str) -> int:
    """Number of the migrations that the database has; 0 without any.

    Raises:
        Unavailable: it cannot be reached.
    """
    async with await connect(url) as connection:
        return await read_version(connection) or 0


async def read_version(connection: AsyncConnection) -> int | None:
    """Number of the last migration; None where the schema is missing."""
    if not await has_schema(connection):
        return None
    cursor = await connection.execute("SELECT coalesce(max(version), 0) FROM agentic_flow.migrations")
    row = await cursor.fetchone()
    return int(row[0]) if row else 0


async def has_schema(connection: AsyncConnection) -> bool:
    """Whether the database was ever migrated; any role may ask."""
    cursor = await connection.execute(
        "SELECT 1 FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace "
        "WHERE n.nspname = 'agentic_flow' AND c.relname = 'migrations'"
    )
    return await cursor.fetchone() is not None


async def _needed_version(connection: AsyncConnection) -> int:
    """The migration that a program must know. A newer build may note (column `reader_min`) that one of its
    own harms nobody who knows an older one: a new column, say."""
    cursor = await connection.execute(
        "SELECT coalesce(max(coalesce((to_jsonb(m) ->> 'reader_min')::integer, m.version)), 0) "
        "FROM agentic_flow.migrations AS m"
    )
    row = await cursor.fetchone()
    return int(row[0]) if row else 0


async def check_version(connection: AsyncConnection, *, allow_older: bool = False) -> None:
    """Refuse a schema that this program cannot work with.

    Raises:
        NeedsNewer: it is too new.
        Conflict: it is too old, unless that is allowed.
    """
    version = await read_version(connection) or 0
    if version > len(MIGRATIONS) and (needed := await _needed_version(connection)) > len(MIGRATIONS):
        raise NeedsNewer(
            f"the PostgreSQL schema needs version {needed!r}, this program knows {len(MIGRATIONS)!r}",
            hint="use the version of agentic-flow that wrote it, or a newer one",
        )
    if version < len(MIGRATIONS) and not allow_older:
        raise Conflict(
            f"the PostgreSQL schema has version {version!r}, this program needs {len(MIGRATIONS)!r}",
            hint=f"run {MIGRATE_COMMAND!r}",
        )


async def find_pgvector(connection: AsyncConnection) -> str | None:
    """The schema of the extension; None where it is not installed.

    Raises:
        Unavailable: it is older than PGVECTOR_MIN.
    """
    cursor = await connection.execute(
        "SELECT n.nspname, e.extversion FROM pg_extension AS e JOIN pg_namespace AS n ON n.oid = "
        "e.extnamespace "
        "WHERE e.extname = 'vector'"
    )
    row = await cursor.fetchone()
    if row is None:
        return None
    if tuple(map(int, re.findall(r"\d+", row[1])[:3])) < PGVECTOR_MIN:
        raise Unavailable(
            f"the database has pgvector {row[1]!r}",
            hint=f"update it to {'.'.join(map(str, PGVECTOR_MIN))} or newer: ALTER EXTENSION vector UPDATE",
        )
    return str(row[0])


async def _install_pgvector(connection: AsyncConnection) -> None:
    schema = await find_pgvector(connection)
    if schema is None:
        cursor = await connection.execute("SELECT 1 FROM pg_available_extensions WHERE name = 'vector'")
        if await cursor.fetchone() is None:
            raise Unavailable(
                "the PostgreSQL server has no pgvector",
                hint="install the package of pgvector for its version, or choose a server that has it",
            )
        await _allowed(connection, "CREATE EXTENSION vector", "CREATE EXTENSION vector")
        schema = await find_pgvector(connection)
    await connection.execute("SELECT set_config('search_path', quote_ident(%s), true)", (schema,))


async def _make_app_role(connection: AsyncConnection) -> None:
    """The role that the store works as. Roles belong to the server: another database may have made it."""
    wanted = f"CREATE ROLE {APP_ROLE} NOLOGIN NOSUPERUSER NOBYPASSRLS"
    cursor = await connection.execute(
        "SELECT rolsuper OR rolbypassrls FROM pg_roles WHERE rolname = %s", (APP_ROLE,)
    )
    row = await cursor.fetchone()
    if row is None:
        try:
            async with connection.transaction():
                await _allowed(connection, wanted, f"{wanted}; GRANT {APP_ROLE} TO …")
        except (errors.DuplicateObject, errors.UniqueViolation):
            pass  # another database of this server made it at the same time
    elif row[0]:
        raise Forbidden(
            f"the role {APP_ROLE!r} bypasses row-level security",
            hint=f"ALTER ROLE {APP_ROLE} NOSUPERUSER NOBYPASSRLS",
        )
    if not await _is_member(connection):
        grant = f"GRANT {APP_ROLE} TO CURRENT_USER"
        await _allowed(connection, grant, f"GRANT {APP_ROLE} TO …")


async def work_as_app(connection: AsyncConnection) -> None:
    """Become the application role until the transaction ends.

    Raises:
        Forbidden: the role of the URL may not, or the wall between tenants would not hold that role.
    """
    cursor = await connection.execute(
        "SELECT NOT rolsuper AND NOT rolbypassrls FROM pg_roles WHERE rolname = %s", (APP_ROLE,)
    )
    row = await cursor.fetchone()
    if row is None or not row[0]:
        raise Forbidden(
            f"the role {APP_ROLE!r} is missing or bypasses row-level security",
            hint=f"ALTER ROLE {APP_ROLE} NOSUPERUSER NOBYPASSRLS, or CREATE it so",
        )
    if not await _is_member(connection):
        raise Forbidden(
            f"the role of the database URL cannot work as {APP_ROLE!r}",
            hint=f"have an administrator run: GRANT {APP_ROLE} TO …",
        )
    await connection.execute("SET LOCAL ROLE agentic_flow_app")


async def _is_member(connection: AsyncConnection) -> bool:
    cursor = await connection.execute("SELECT pg_has_role(current_user, %s, 'MEMBER')", (APP_ROLE,))
    row = await cursor.fetchone()
    return row is not None and bool(row[0])


async def _allowed(connection: AsyncConnection, statement: LiteralString, remedy: str) -> None:
    """Run a statement that not every role may.

    Raises:
        Forbidden: this one may not.
    """
    try:
        await connection.execute(statement)
    except errors.InsufficientPrivilege as error:
        raise Forbidden(
            f"the role of the database URL may not migrate: {error.diag.message_primary}",
            hint=f"have an administrator run: {remedy}",
        ) from error
