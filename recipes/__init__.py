"""Recipes worth running; each begins with its command and what it measured."""
