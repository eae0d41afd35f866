"""A request's media on their way to the model: files, wishes, embeddings."""
