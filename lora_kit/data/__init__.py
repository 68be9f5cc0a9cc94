"""Rows in, labelled tokens out."""
