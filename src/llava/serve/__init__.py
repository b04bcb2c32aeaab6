"""Over HTTP: the OpenAI chat-completions protocol in front of one engine."""
