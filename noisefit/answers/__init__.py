"""Answers: drawn, journalled, scored."""
