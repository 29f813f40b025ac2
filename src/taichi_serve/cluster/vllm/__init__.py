"""The real cluster: several vLLM engine cores, each in a process and failure domain of its own."""
