"""Report: what is said of an artifact: its model card, and a page of charts.

Imports errors, spec, checkpoint, pipeline, evaluate.
"""
