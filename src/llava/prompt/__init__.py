"""From a conversation to arrays: the same code in training, chat, server and evaluation. No torch in this room."""
