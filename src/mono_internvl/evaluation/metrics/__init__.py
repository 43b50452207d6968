"""Pure functions of strings and numbers that score answers, by family; no model and no files.

`metric` says what a metric of a user's own records is. The other modules are the published
benchmarks' rules, the official scorers' quirks included: each says whose rule it is.
"""
