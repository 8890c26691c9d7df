"""Data plane: the trajectory store and what is computed from it with Arrow, Parquet, tar, DuckDB and polars.

Never imports torch, diffusers, pipelines or cli.
"""
