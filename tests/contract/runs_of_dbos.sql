BEGIN TRANSACTION;
CREATE TABLE af_executors (
        executor_id TEXT PRIMARY KEY, heartbeat_at_s DOUBLE PRECISION NOT NULL);
CREATE TABLE af_leases (
        workflow_id TEXT PRIMARY KEY, executor_id TEXT NOT NULL, epoch INTEGER NOT NULL,
        started INTEGER NOT NULL, tenant TEXT NOT NULL, name TEXT NOT NULL,
        accepted_at_s DOUBLE PRECISION NOT NULL);
INSERT INTO "af_leases" VALUES('run-done','host-1',1,1,'a','team',1.7959805501528756618e+09);
INSERT INTO "af_leases" VALUES('run-failed','host-1',1,1,'a','leaf',1.79598055059329104422e+09);
INSERT INTO "af_leases" VALUES('run-cancelled','host-1',1,1,'b','leaf',1.79598055063053464895e+09);
INSERT INTO "af_leases" VALUES('run-interrupted','host-1',1,1,'a','team',1.79598055115442156791e+09);
INSERT INTO "af_leases" VALUES('run-fills','host-1',1,1,'b','leaf',1.79598055142977786067e+09);
INSERT INTO "af_leases" VALUES('run-queued','host-1',1,0,'a','leaf',1.79598055147440123554e+09);
CREATE TABLE application_versions (
    version_id TEXT NOT NULL PRIMARY KEY,
    version_name TEXT NOT NULL UNIQUE,
    version_timestamp INTEGER NOT NULL DEFAULT (strftime('%s','now') * 1000),
    created_at INTEGER NOT NULL DEFAULT (strftime('%s','now') * 1000)
, "application_name" TEXT DEFAULT NULL);
INSERT INTO "application_versions" VALUES('3d82cf2b-7e87-40af-bbf5-bedff8a10e2e','runs-1',1795980549000,1795980549000,'agentic-flow');
CREATE TABLE dbos_migrations (version INTEGER NOT NULL PRIMARY KEY);
INSERT INTO "dbos_migrations" VALUES(125);
CREATE TABLE notifications (
    message_uuid TEXT NOT NULL DEFAULT (hex(randomblob(16))) PRIMARY KEY,
    destination_uuid TEXT NOT NULL,
    topic TEXT,
    message TEXT NOT NULL,
    created_at_epoch_ms INTEGER NOT NULL DEFAULT (strftime('%s','now') * 1000), "serialization" TEXT DEFAULT NULL, "consumed" BOOLEAN NOT NULL DEFAULT FALSE, consumed_by_function_id INTEGER,
    FOREIGN KEY (destination_uuid) REFERENCES workflow_status(workflow_uuid) 
        ON UPDATE CASCADE ON DELETE CASCADE
);
CREATE TABLE "operation_outputs" (
    workflow_uuid TEXT NOT NULL,
    function_id INTEGER NOT NULL,
    function_name TEXT NOT NULL DEFAULT '',
    output TEXT,
    error TEXT,
    child_workflow_id TEXT,
    started_at_epoch_ms INTEGER,
    completed_at_epoch_ms INTEGER,
    serialization TEXT,
    application_name TEXT DEFAULT NULL,
    retention_timestamp INTEGER NOT NULL DEFAULT (strftime('%s','now') * 1000),
    PRIMARY KEY (workflow_uuid, function_id)
);
INSERT INTO "operation_outputs" VALUES('run-done',1,'plan','{"key":"run-done:1"}',NULL,NULL,1795980550221,1795980550255,'agentic-flow-json','agentic-flow',1795980550000);
INSERT INTO "operation_outputs" VALUES('run-done',2,'agentic_flow',NULL,NULL,'run-done.ok',1795980550295,1795980550302,NULL,'agentic-flow',1795980550000);
INSERT INTO "operation_outputs" VALUES('run-done',3,'agentic_flow',NULL,NULL,'run-done.bad',1795980550313,1795980550319,NULL,'agentic-flow',1795980550000);
INSERT INTO "operation_outputs" VALUES('run-done.ok',1,'first','{"key":"run-done.ok:1"}',NULL,NULL,1795980550313,1795980550322,'agentic-flow-json','agentic-flow',1795980550000);
INSERT INTO "operation_outputs" VALUES('run-done.bad',1,'first','{"key":"run-done.bad:1"}',NULL,NULL,1795980550337,1795980550340,'agentic-flow-json','agentic-flow',1795980550000);
INSERT INTO "operation_outputs" VALUES('run-done.ok',2,'second','{"key":"run-done.ok:2"}',NULL,NULL,1795980550345,1795980550350,'agentic-flow-json','agentic-flow',1795980550000);
INSERT INTO "operation_outputs" VALUES('run-done.bad',2,'second',NULL,'{"$error":{"type":"urn:agentic-flow:error:provider_failed","title":"provider failed","status":502,"detail":"no","code":"provider_failed","retryable":true,"hint":"retry"}}',NULL,1795980550353,1795980550354,'agentic-flow-json','agentic-flow',1795980550000);
INSERT INTO "operation_outputs" VALUES('run-done',4,'DBOS.getResult','{"first":{"key":"run-done.ok:1"},"second":{"key":"run-done.ok:2"}}',NULL,'run-done.ok',1795980550367,1795980550367,'agentic-flow-json','agentic-flow',1795980550000);
INSERT INTO "operation_outputs" VALUES('run-done',5,'DBOS.getResult',NULL,'{"$error":{"type":"urn:agentic-flow:error:provider_failed","title":"provider failed","status":502,"detail":"no","code":"provider_failed","retryable":true,"hint":"retry"}}','run-done.bad',1795980550408,1795980550418,'agentic-flow-json','agentic-flow',1795980550000);
INSERT INTO "operation_outputs" VALUES('run-done',6,'agentic_flow',NULL,NULL,'run-done.quick',1795980550438,1795980550445,NULL,'agentic-flow',1795980550000);
INSERT INTO "operation_outputs" VALUES('run-done',7,'agentic_flow',NULL,NULL,'run-done.slow',1795980550450,1795980550459,NULL,'agentic-flow',1795980550000);
INSERT INTO "operation_outputs" VALUES('run-done.quick',1,'first','{"key":"run-done.quick:1"}',NULL,NULL,1795980550450,1795980550458,'agentic-flow-json','agentic-flow',1795980550000);
INSERT INTO "operation_outputs" VALUES('run-done.slow',1,'first','{"key":"run-done.slow:1"}',NULL,NULL,1795980550463,1795980550470,'agentic-flow-json','agentic-flow',1795980550000);
INSERT INTO "operation_outputs" VALUES('run-done.quick',2,'second','{"key":"run-done.quick:2"}',NULL,NULL,1795980550473,1795980550476,'agentic-flow-json','agentic-flow',1795980550000);
INSERT INTO "operation_outputs" VALUES('run-done.slow',2,'second','{"key":"run-done.slow:2"}',NULL,NULL,1795980550479,1795980550487,'agentic-flow-json','agentic-flow',1795980550000);
INSERT INTO "operation_outputs" VALUES('run-done',8,'DBOS.getResult','{"first":{"key":"run-done.quick:1"},"second":{"key":"run-done.quick:2"}}',NULL,'run-done.quick',1795980550509,1795980550512,'agentic-flow-json','agentic-flow',1795980550000);
INSERT INTO "operation_outputs" VALUES('run-done',9,'DBOS.getResult','{"first":{"key":"run-done.slow:1"},"second":{"key":"run-done.slow:2"}}',NULL,'run-done.slow',1795980550529,1795980550529,'agentic-flow-json','agentic-flow',1795980550000);
INSERT INTO "operation_outputs" VALUES('run-done',10,'merge','{"key":"run-done:10"}',NULL,NULL,1795980550552,1795980550570,'agentic-flow-json','agentic-flow',1795980550000);
INSERT INTO "operation_outputs" VALUES('run-failed',1,'first','{"key":"run-failed:1"}',NULL,NULL,1795980550603,1795980550605,'agentic-flow-json','agentic-flow',1795980550000);
INSERT INTO "operation_outputs" VALUES('run-failed',2,'second',NULL,'{"$error":{"type":"urn:agentic-flow:error:provider_failed","title":"provider failed","status":502,"detail":"no","code":"provider_failed","retryable":true,"hint":"retry"}}',NULL,1795980550609,1795980550611,'agentic-flow-json','agentic-flow',1795980550000);
INSERT INTO "operation_outputs" VALUES('run-cancelled',1,'first','{"key":"run-cancelled:1"}',NULL,NULL,1795980550637,1795980550640,'agentic-flow-json','agentic-flow',1795980550000);
INSERT INTO "operation_outputs" VALUES('run-interrupted',1,'plan','{"key":"run-interrupted:1"}',NULL,NULL,1795980551183,1795980551187,'agentic-flow-json','agentic-flow',1795980551000);
INSERT INTO "operation_outputs" VALUES('run-interrupted',2,'agentic_flow',NULL,NULL,'run-interrupted.ok',1795980551201,1795980551204,NULL,'agentic-flow',1795980551000);
INSERT INTO "operation_outputs" VALUES('run-interrupted',3,'agentic_flow',NULL,NULL,'run-interrupted.bad',1795980551207,1795980551214,NULL,'agentic-flow',1795980551000);
INSERT INTO "operation_outputs" VALUES('run-interrupted.ok',1,'first','{"key":"run-interrupted.ok:1"}',NULL,NULL,1795980551209,1795980551216,'agentic-flow-json','agentic-flow',1795980551000);
INSERT INTO "operation_outputs" VALUES('run-interrupted.bad',1,'first','{"key":"run-interrupted.bad:1"}',NULL,NULL,1795980551219,1795980551220,'agentic-flow-json','agentic-flow',1795980551000);
INSERT INTO "operation_outputs" VALUES('run-interrupted.ok',2,'second','{"key":"run-interrupted.ok:2"}',NULL,NULL,1795980551223,1795980551226,'agentic-flow-json','agentic-flow',1795980551000);
INSERT INTO "operation_outputs" VALUES('run-interrupted.bad',2,'second',NULL,'{"$error":{"type":"urn:agentic-flow:error:provider_failed","title":"provider failed","status":502,"detail":"no","code":"provider_failed","retryable":true,"hint":"retry"}}',NULL,1795980551228,1795980551231,'agentic-flow-json','agentic-flow',1795980551000);
INSERT INTO "operation_outputs" VALUES('run-interrupted',4,'DBOS.getResult','{"first":{"key":"run-interrupted.ok:1"},"second":{"key":"run-interrupted.ok:2"}}',NULL,'run-interrupted.ok',1795980551239,1795980551239,'agentic-flow-json','agentic-flow',1795980551000);
INSERT INTO "operation_outputs" VALUES('run-interrupted',5,'DBOS.getResult',NULL,'{"$error":{"type":"urn:agentic-flow:error:provider_failed","title":"provider failed","status":502,"detail":"no","code":"provider_failed","retryable":true,"hint":"retry"}}','run-interrupted.bad',1795980551247,1795980551247,'agentic-flow-json','agentic-flow',1795980551000);
INSERT INTO "operation_outputs" VALUES('run-interrupted',6,'agentic_flow',NULL,NULL,'run-interrupted.quick',1795980551252,1795980551255,NULL,'agentic-flow',1795980551000);
INSERT INTO "operation_outputs" VALUES('run-interrupted',7,'agentic_flow',NULL,NULL,'run-interrupted.slow',1795980551258,1795980551263,NULL,'agentic-flow',1795980551000);
INSERT INTO "operation_outputs" VALUES('run-interrupted.quick',1,'first','{"key":"run-interrupted.quick:1"}',NULL,NULL,1795980551260,1795980551265,'agentic-flow-json','agentic-flow',1795980551000);
INSERT INTO "operation_outputs" VALUES('run-interrupted.quick',2,'second','{"key":"run-interrupted.quick:2"}',NULL,NULL,1795980551371,1795980551373,'agentic-flow-json','agentic-flow',1795980551000);
INSERT INTO "operation_outputs" VALUES('run-interrupted',8,'DBOS.getResult','{"first":{"key":"run-interrupted.quick:1"},"second":{"key":"run-interrupted.quick:2"}}',NULL,'run-interrupted.quick',1795980551395,1795980551395,'agentic-flow-json','agentic-flow',1795980551000);
INSERT INTO "operation_outputs" VALUES('run-interrupted.slow',1,'first','{"key":"run-interrupted.slow:1"}',NULL,NULL,1795980551268,1795980551380,'agentic-flow-json','agentic-flow',1795980551000);
INSERT INTO "operation_outputs" VALUES('run-fills',1,'first','{"key":"run-fills:1"}',NULL,NULL,1795980551445,1795980551449,'agentic-flow-json','agentic-flow',1795980551000);
CREATE TABLE queues (
    queue_id TEXT PRIMARY KEY DEFAULT (hex(randomblob(16))),
    name TEXT NOT NULL UNIQUE,
    concurrency INTEGER,
    worker_concurrency INTEGER,
    rate_limit_max INTEGER,
    rate_limit_period_sec REAL,
    priority_enabled BOOLEAN NOT NULL DEFAULT FALSE,
    partition_queue BOOLEAN NOT NULL DEFAULT FALSE,
    polling_interval_sec REAL NOT NULL DEFAULT 1.0,
    created_at INTEGER NOT NULL DEFAULT (strftime('%s','now') * 1000),
    updated_at INTEGER NOT NULL DEFAULT (strftime('%s','now') * 1000)
, "application_name" TEXT DEFAULT NULL, "partition_concurrency" INTEGER DEFAULT NULL, "partition_worker_concurrency" INTEGER DEFAULT NULL, "partition_rate_limit_max" INTEGER DEFAULT NULL, "partition_rate_limit_period_sec" REAL DEFAULT NULL);
CREATE TABLE streams (
    workflow_uuid TEXT NOT NULL,
    key TEXT NOT NULL,
    value TEXT NOT NULL,
    "offset" INTEGER NOT NULL, function_id INTEGER NOT NULL DEFAULT 0, "serialization" TEXT DEFAULT NULL,
    PRIMARY KEY (workflow_uuid, key, "offset"),
    FOREIGN KEY (workflow_uuid) REFERENCES workflow_status(workflow_uuid) 
        ON UPDATE CASCADE ON DELETE CASCADE
);
CREATE TABLE workflow_events (
    workflow_uuid TEXT NOT NULL,
    key TEXT NOT NULL,
    value TEXT NOT NULL, "serialization" TEXT DEFAULT NULL,
    PRIMARY KEY (workflow_uuid, key),
    FOREIGN KEY (workflow_uuid) REFERENCES workflow_status(workflow_uuid) 
        ON UPDATE CASCADE ON DELETE CASCADE
);
CREATE TABLE workflow_events_history (
    workflow_uuid TEXT NOT NULL,
    function_id INTEGER NOT NULL,
    key TEXT NOT NULL,
    value TEXT NOT NULL, "serialization" TEXT DEFAULT NULL,
    PRIMARY KEY (workflow_uuid, function_id, key),
    FOREIGN KEY (workflow_uuid) REFERENCES workflow_status(workflow_uuid)
        ON UPDATE CASCADE ON DELETE CASCADE
);
CREATE TABLE workflow_input (
    workflow_uuid TEXT NOT NULL PRIMARY KEY,
    inputs TEXT,
    retention_timestamp INTEGER NOT NULL DEFAULT (strftime('%s','now') * 1000)
);
INSERT INTO "workflow_input" VALUES('run-done','{"args":["team",{"holds":false}],"kwargs":{}}',1795980550000);
INSERT INTO "workflow_input" VALUES('run-done.ok','{"args":["leaf",{}],"kwargs":{}}',1795980550000);
INSERT INTO "workflow_input" VALUES('run-done.bad','{"args":["leaf",{"fails":true}],"kwargs":{}}',1795980550000);
INSERT INTO "workflow_input" VALUES('run-done.quick','{"args":["leaf",{}],"kwargs":{}}',1795980550000);
INSERT INTO "workflow_input" VALUES('run-done.slow','{"args":["leaf",{"holds":false}],"kwargs":{}}',1795980550000);
INSERT INTO "workflow_input" VALUES('run-failed','{"args":["leaf",{"fails":true}],"kwargs":{}}',1795980550000);
INSERT INTO "workflow_input" VALUES('run-cancelled','{"args":["leaf",{"holds":true}],"kwargs":{}}',1795980550000);
INSERT INTO "workflow_input" VALUES('run-interrupted','{"args":["team",{"holds":true}],"kwargs":{}}',1795980551000);
INSERT INTO "workflow_input" VALUES('run-interrupted.ok','{"args":["leaf",{}],"kwargs":{}}',1795980551000);
INSERT INTO "workflow_input" VALUES('run-interrupted.bad','{"args":["leaf",{"fails":true}],"kwargs":{}}',1795980551000);
INSERT INTO "workflow_input" VALUES('run-interrupted.quick','{"args":["leaf",{}],"kwargs":{}}',1795980551000);
INSERT INTO "workflow_input" VALUES('run-interrupted.slow','{"args":["leaf",{"holds":true}],"kwargs":{}}',1795980551000);
INSERT INTO "workflow_input" VALUES('run-fills','{"args":["leaf",{"holds":true}],"kwargs":{}}',1795980551000);
INSERT INTO "workflow_input" VALUES('run-queued','{"args":["leaf",{}],"kwargs":{}}',1795980551000);
CREATE TABLE workflow_output (
    workflow_uuid TEXT NOT NULL PRIMARY KEY,
    output TEXT,
    error TEXT,
    retention_timestamp INTEGER NOT NULL DEFAULT (strftime('%s','now') * 1000)
);
INSERT INTO "workflow_output" VALUES('run-done.ok','{"first":{"key":"run-done.ok:1"},"second":{"key":"run-done.ok:2"}}',NULL,1795980550000);
INSERT INTO "workflow_output" VALUES('run-done.bad',NULL,'{"$error":{"type":"urn:agentic-flow:error:provider_failed","title":"provider failed","status":502,"detail":"no","code":"provider_failed","retryable":true,"hint":"retry"}}',1795980550000);
INSERT INTO "workflow_output" VALUES('run-done.quick','{"first":{"key":"run-done.quick:1"},"second":{"key":"run-done.quick:2"}}',NULL,1795980550000);
INSERT INTO "workflow_output" VALUES('run-done.slow','{"first":{"key":"run-done.slow:1"},"second":{"key":"run-done.slow:2"}}',NULL,1795980550000);
INSERT INTO "workflow_output" VALUES('run-done','{"planned":{"key":"run-done:1"},"early":{"ok":{"first":{"key":"run-done.ok:1"},"second":{"key":"run-done.ok:2"}},"bad":{"error":{"type":"urn:agentic-flow:error:provider_failed","title":"provider failed","status":502,"detail":"no","code":"provider_failed","retryable":true,"hint":"retry"}}},"late":{"quick":{"first":{"key":"run-done.quick:1"},"second":{"key":"run-done.quick:2"}},"slow":{"first":{"key":"run-done.slow:1"},"second":{"key":"run-done.slow:2"}}},"merged":{"key":"run-done:10"}}',NULL,1795980550000);
INSERT INTO "workflow_output" VALUES('run-failed',NULL,'{"$error":{"type":"urn:agentic-flow:error:provider_failed","title":"provider failed","status":502,"detail":"no","code":"provider_failed","retryable":true,"hint":"retry"}}',1795980550000);
INSERT INTO "workflow_output" VALUES('run-interrupted.ok','{"first":{"key":"run-interrupted.ok:1"},"second":{"key":"run-interrupted.ok:2"}}',NULL,1795980551000);
INSERT INTO "workflow_output" VALUES('run-interrupted.bad',NULL,'{"$error":{"type":"urn:agentic-flow:error:provider_failed","title":"provider failed","status":502,"detail":"no","code":"provider_failed","retryable":true,"hint":"retry"}}',1795980551000);
INSERT INTO "workflow_output" VALUES('run-interrupted.quick','{"first":{"key":"run-interrupted.quick:1"},"second":{"key":"run-interrupted.quick:2"}}',NULL,1795980551000);
CREATE TABLE workflow_schedules (
    schedule_id TEXT PRIMARY KEY,
    schedule_name TEXT NOT NULL UNIQUE,
    workflow_name TEXT NOT NULL,
    workflow_class_name TEXT,
    schedule TEXT NOT NULL,
    status TEXT NOT NULL DEFAULT 'ACTIVE',
    context TEXT NOT NULL
, "last_fired_at" TEXT DEFAULT NULL, "automatic_backfill" BOOLEAN NOT NULL DEFAULT FALSE, "cron_timezone" TEXT DEFAULT NULL, "queue_name" TEXT DEFAULT NULL, "application_name" TEXT DEFAULT NULL);
CREATE TABLE workflow_status (
    workflow_uuid TEXT PRIMARY KEY,
    status TEXT,
    name TEXT,
    authenticated_user TEXT,
    assumed_role TEXT,
    authenticated_roles TEXT,
    request TEXT,
    output TEXT,
    error TEXT,
    executor_id TEXT,
    created_at INTEGER NOT NULL DEFAULT (strftime('%s','now') * 1000),
    updated_at INTEGER NOT NULL DEFAULT (strftime('%s','now') * 1000),
    application_version TEXT,
    application_id TEXT,
    class_name TEXT DEFAULT NULL,
    config_name TEXT DEFAULT NULL,
    recovery_attempts INTEGER DEFAULT 0,
    queue_name TEXT,
    workflow_timeout_ms INTEGER,
    workflow_deadline_epoch_ms INTEGER,
    inputs TEXT,
    started_at_epoch_ms INTEGER,
    deduplication_id TEXT,
    priority INTEGER NOT NULL DEFAULT 0
, queue_partition_key TEXT, forked_from TEXT, "owner_xid" TEXT DEFAULT NULL, "parent_workflow_id" TEXT DEFAULT NULL, "serialization" TEXT DEFAULT NULL, "delay_until_epoch_ms" BIGINT DEFAULT NULL, "was_forked_from" BOOLEAN NOT NULL DEFAULT FALSE, "rate_limited" BOOLEAN NOT NULL DEFAULT FALSE, "completed_at" BIGINT, "attributes" TEXT, "schedule_name" TEXT, "debounce_deadline_epoch_ms" BIGINT DEFAULT NULL, "is_debounced" BOOLEAN NOT NULL DEFAULT FALSE, "application_name" TEXT DEFAULT NULL, "creator_xid" TEXT DEFAULT NULL);
INSERT INTO "workflow_status" VALUES('run-done','SUCCESS','agentic_flow',NULL,NULL,NULL,NULL,NULL,NULL,'host-1',1795980550000,1795980550000,'runs-1','',NULL,NULL,1,NULL,NULL,NULL,NULL,NULL,NULL,0,NULL,NULL,NULL,NULL,'agentic-flow-json',NULL,0,0,1795980550000,'null',NULL,NULL,0,'agentic-flow','4081542e-0ef0-4268-aed5-53c204094058');
INSERT INTO "workflow_status" VALUES('run-done.ok','SUCCESS','agentic_flow',NULL,NULL,NULL,NULL,NULL,NULL,'host-1',1795980550000,1795980550000,'runs-1','',NULL,NULL,1,NULL,NULL,NULL,NULL,NULL,NULL,0,NULL,NULL,NULL,'run-done','agentic-flow-json',NULL,0,0,1795980550000,'null',NULL,NULL,0,'agentic-flow','775de5d1-0219-4a92-a19e-aa2a965bb7af');
INSERT INTO "workflow_status" VALUES('run-done.bad','ERROR','agentic_flow',NULL,NULL,NULL,NULL,NULL,NULL,'host-1',1795980550000,1795980550000,'runs-1','',NULL,NULL,1,NULL,NULL,NULL,NULL,NULL,NULL,0,NULL,NULL,NULL,'run-done','agentic-flow-json',NULL,0,0,1795980550000,'null',NULL,NULL,0,'agentic-flow','3f23ff87-f4e2-44ef-8258-12da18d6c816');
INSERT INTO "workflow_status" VALUES('run-done.quick','SUCCESS','agentic_flow',NULL,NULL,NULL,NULL,NULL,NULL,'host-1',1795980550000,1795980550000,'runs-1','',NULL,NULL,1,NULL,NULL,NULL,NULL,NULL,NULL,0,NULL,NULL,NULL,'run-done','agentic-flow-json',NULL,0,0,1795980550000,'null',NULL,NULL,0,'agentic-flow','c90ea18f-64d3-4dc5-8f24-d9281ec2aed2');
INSERT INTO "workflow_status" VALUES('run-done.slow','SUCCESS','agentic_flow',NULL,NULL,NULL,NULL,NULL,NULL,'host-1',1795980550000,1795980550000,'runs-1','',NULL,NULL,1,NULL,NULL,NULL,NULL,NULL,NULL,0,NULL,NULL,NULL,'run-done','agentic-flow-json',NULL,0,0,1795980550000,'null',NULL,NULL,0,'agentic-flow','ff942009-b189-4bfa-a094-8e8fe0cc9f88');
INSERT INTO "workflow_status" VALUES('run-failed','ERROR','agentic_flow',NULL,NULL,NULL,NULL,NULL,NULL,'host-1',1795980550000,1795980550000,'runs-1','',NULL,NULL,1,NULL,NULL,NULL,NULL,NULL,NULL,0,NULL,NULL,NULL,NULL,'agentic-flow-json',NULL,0,0,1795980550000,'null',NULL,NULL,0,'agentic-flow','57ebb957-ea22-4f52-b86c-72acb156c2bf');
INSERT INTO "workflow_status" VALUES('run-cancelled','CANCELLED','agentic_flow',NULL,NULL,NULL,NULL,NULL,NULL,'host-1',1795980550000,1795980550649,'runs-1','',NULL,NULL,1,NULL,NULL,NULL,NULL,NULL,NULL,0,NULL,NULL,NULL,NULL,'agentic-flow-json',NULL,0,0,1795980550649,'null',NULL,NULL,0,'agentic-flow','657c693d-214a-4281-b24d-fc04d801a9ab');
INSERT INTO "workflow_status" VALUES('run-interrupted','PENDING','agentic_flow',NULL,NULL,NULL,NULL,NULL,NULL,'host-1',1795980551000,1795980551000,'runs-1','',NULL,NULL,1,NULL,NULL,NULL,NULL,NULL,NULL,0,NULL,NULL,'76b5a94b-2be0-4d88-978c-c3ae0fa73d6d',NULL,'agentic-flow-json',NULL,0,0,NULL,'null',NULL,NULL,0,'agentic-flow','76b5a94b-2be0-4d88-978c-c3ae0fa73d6d');
INSERT INTO "workflow_status" VALUES('run-interrupted.ok','SUCCESS','agentic_flow',NULL,NULL,NULL,NULL,NULL,NULL,'host-1',1795980551000,1795980551000,'runs-1','',NULL,NULL,1,NULL,NULL,NULL,NULL,NULL,NULL,0,NULL,NULL,NULL,'run-interrupted','agentic-flow-json',NULL,0,0,1795980551000,'null',NULL,NULL,0,'agentic-flow','34c18b9b-b38d-4b42-8602-9e204c069d0e');
INSERT INTO "workflow_status" VALUES('run-interrupted.bad','ERROR','agentic_flow',NULL,NULL,NULL,NULL,NULL,NULL,'host-1',1795980551000,1795980551000,'runs-1','',NULL,NULL,1,NULL,NULL,NULL,NULL,NULL,NULL,0,NULL,NULL,NULL,'run-interrupted','agentic-flow-json',NULL,0,0,1795980551000,'null',NULL,NULL,0,'agentic-flow','ee07aea3-49f4-495e-af55-98b728d7c35d');
INSERT INTO "workflow_status" VALUES('run-interrupted.quick','SUCCESS','agentic_flow',NULL,NULL,NULL,NULL,NULL,NULL,'host-1',1795980551000,1795980551000,'runs-1','',NULL,NULL,1,NULL,NULL,NULL,NULL,NULL,NULL,0,NULL,NULL,NULL,'run-interrupted','agentic-flow-json',NULL,0,0,1795980551000,'null',NULL,NULL,0,'agentic-flow','d3f4e853-cb72-41c9-84d9-212ad57d76ef');
INSERT INTO "workflow_status" VALUES('run-interrupted.slow','PENDING','agentic_flow',NULL,NULL,NULL,NULL,NULL,NULL,'host-1',1795980551000,1795980551000,'runs-1','',NULL,NULL,1,NULL,NULL,NULL,NULL,NULL,NULL,0,NULL,NULL,'519f3ccd-d8a9-4a16-8dba-4983bc6b6c98','run-interrupted','agentic-flow-json',NULL,0,0,NULL,'null',NULL,NULL,0,'agentic-flow','519f3ccd-d8a9-4a16-8dba-4983bc6b6c98');
INSERT INTO "workflow_status" VALUES('run-fills','PENDING','agentic_flow',NULL,NULL,NULL,NULL,NULL,NULL,'host-1',1795980551000,1795980551000,'runs-1','',NULL,NULL,1,NULL,NULL,NULL,NULL,NULL,NULL,0,NULL,NULL,'eb48e3bf-9e36-41e8-aafc-c3e86175c391',NULL,'agentic-flow-json',NULL,0,0,NULL,'null',NULL,NULL,0,'agentic-flow','eb48e3bf-9e36-41e8-aafc-c3e86175c391');
INSERT INTO "workflow_status" VALUES('run-queued','PENDING','agentic_flow',NULL,NULL,NULL,NULL,NULL,NULL,'host-1',1795980551000,1795980551000,'runs-1','',NULL,NULL,1,NULL,NULL,NULL,NULL,NULL,NULL,0,NULL,NULL,'d3df99c8-4b7c-409a-a9e3-d26ace3b2001',NULL,'agentic-flow-json',NULL,0,0,NULL,'null',NULL,NULL,0,'agentic-flow','d3df99c8-4b7c-409a-a9e3-d26ace3b2001');
CREATE INDEX af_leases_by_tenant ON af_leases (tenant, name, accepted_at_s);
CREATE INDEX af_leases_by_executor ON af_leases (executor_id);
CREATE INDEX workflow_status_created_at_index ON workflow_status (created_at);
CREATE INDEX idx_workflow_topic ON notifications (destination_uuid, topic);
CREATE INDEX "idx_workflow_status_delayed" ON "workflow_status" ("delay_until_epoch_ms") WHERE status = 'DELAYED';
CREATE INDEX "idx_workflow_status_forked_from" ON "workflow_status" ("forked_from") WHERE "forked_from" IS NOT NULL;
CREATE INDEX "idx_workflow_status_parent_workflow_id" ON "workflow_status" ("parent_workflow_id") WHERE "parent_workflow_id" IS NOT NULL;
CREATE UNIQUE INDEX "uq_workflow_status_dedup_id" ON "workflow_status" ("queue_name", "deduplication_id") WHERE "deduplication_id" IS NOT NULL;
CREATE INDEX "idx_workflow_status_pending" ON "workflow_status" ("created_at") WHERE "status" = 'PENDING';
CREATE INDEX "idx_workflow_status_failed" ON "workflow_status" ("status", "created_at") WHERE "status" IN ('ERROR', 'CANCELLED', 'MAX_RECOVERY_ATTEMPTS_EXCEEDED');
CREATE INDEX "idx_workflow_status_rate_limited" ON "workflow_status" ("queue_name", "started_at_epoch_ms") WHERE "rate_limited" = TRUE;
CREATE INDEX "idx_workflow_status_completed_at" ON "workflow_status" ("completed_at") WHERE "completed_at" IS NOT NULL;
CREATE INDEX "idx_workflow_status_started_at" ON "workflow_status" ("started_at_epoch_ms") WHERE "started_at_epoch_ms" IS NOT NULL;
CREATE INDEX "idx_workflow_status_schedule_name" ON "workflow_status" ("schedule_name") WHERE "schedule_name" IS NOT NULL;
CREATE UNIQUE INDEX "uq_application_versions_owner_version"
    ON application_versions ("application_name", "version_name")
    WHERE "application_name" IS NOT NULL;
CREATE UNIQUE INDEX "uq_application_versions_unclaimed_version"
    ON application_versions ("version_name")
    WHERE "application_name" IS NULL;
CREATE INDEX idx_workflow_input_retention
    ON workflow_input (retention_timestamp);
CREATE INDEX idx_workflow_output_retention
    ON workflow_output (retention_timestamp);
CREATE INDEX idx_operation_outputs_retention
    ON operation_outputs (retention_timestamp);
CREATE INDEX "idx_workflow_status_in_flight_v2" ON "workflow_status" ("queue_name", "status", "priority", "created_at", "application_name") WHERE "status" IN ('ENQUEUED', 'PENDING');
CREATE INDEX "idx_workflow_status_partition_dequeue_v3" ON "workflow_status" ("queue_name", "status", "queue_partition_key", "priority", "created_at", "workflow_uuid", "application_name") WHERE "status" IN ('ENQUEUED', 'PENDING') AND "queue_partition_key" IS NOT NULL;
CREATE INDEX "idx_operation_outputs_completed_at_function_name_v2" ON "operation_outputs" ("completed_at_epoch_ms", "function_name", "application_name");
CREATE INDEX "idx_workflow_status_deadline" ON "workflow_status" ("workflow_deadline_epoch_ms") WHERE "status" IN ('ENQUEUED', 'PENDING', 'DELAYED') AND "workflow_deadline_epoch_ms" IS NOT NULL;
CREATE INDEX "idx_application_versions_timestamp" ON "application_versions" ("version_timestamp" DESC);
CREATE INDEX "idx_application_versions_owner_timestamp" ON "application_versions" ("application_name", "version_timestamp" DESC);
COMMIT;
