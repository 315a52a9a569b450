"""Several server processes under one supervisor."""
