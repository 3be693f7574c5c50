"""The HTTP server: OpenAI, Anthropic and Responses APIs over the engine."""
