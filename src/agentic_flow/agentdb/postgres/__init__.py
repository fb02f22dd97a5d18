"""AgentDB on PostgreSQL with pgvector: the same `VectorStore`, chosen by URL."""
