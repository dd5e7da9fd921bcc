"""Download, convert, clean and de-duplicate corpora."""
