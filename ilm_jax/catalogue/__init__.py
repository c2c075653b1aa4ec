"""The catalogue's titles, and the trie of their tokens."""
