"""vLLM at arm's length: a worker process that starts engines and times them, and the machine that it runs on."""
