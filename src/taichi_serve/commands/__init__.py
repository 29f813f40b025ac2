"""What `taichi` can do beside serving: one module for each command, with `main(argv)` and its exit status."""
