"""numba, threads and compilation: nothing about sites."""

__all__: list[str] = []
