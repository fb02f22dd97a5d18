"""AgentDB and its peers behind one small interface, each run in a process of its own (see ../agentdb.py)."""
