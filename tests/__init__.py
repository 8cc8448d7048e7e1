"""Tests: every behaviour against an independent computation."""
