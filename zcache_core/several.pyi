ALLOCATORS: tuple[str, ...]
