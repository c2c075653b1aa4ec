"""Collaborative filtering: iALS vectors, the entity table, reference rankers."""
