"""Measuring what compression does to a real model."""
