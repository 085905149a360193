"""What networks see in images: the extractors, whose features samples are judged by and a training may be aligned with."""
