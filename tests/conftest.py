"""What holds for all tests."""

import signal

# a shell's background jobs are started with Ctrl-C ignored, and so would be the processes that tests send it to
signal.signal(signal.SIGINT, signal.default_int_handler)
