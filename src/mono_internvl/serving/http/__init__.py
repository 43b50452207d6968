"""A server of chat completions over HTTP: one model, one engine, the OpenAI API."""
