"""The embedded trained model and its few KB of text, as package data.

Imports nothing of ours.
"""
