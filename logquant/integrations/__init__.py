"""LogQuant caches inside other libraries."""
