"""What `validate` looks for: one small function per fault, over one episode or over the whole dataset."""
