"""Tests, named after the laws that they check."""
