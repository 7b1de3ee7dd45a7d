"""Files, streams, memory, processes and progress: nothing about models. Empty, because a worker process imports it."""

__all__: list[str] = []
