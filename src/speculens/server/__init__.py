"""Any OpenAI client can talk to it: HTTP in one process, the engine in another."""
