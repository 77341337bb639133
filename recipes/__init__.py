"""Recipes that are worth running; each begins with the command that runs it and the result it measured."""
