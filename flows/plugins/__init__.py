"""What Prefect loads of this package: its command line by a bare name, blocks for mail and for the keys of a store."""
