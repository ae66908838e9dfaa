"""Measuring: suites of questions, drafters beside `none` in one process, and what a run came to."""
