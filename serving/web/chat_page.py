"""The page of a chat or question answering adapter."""
