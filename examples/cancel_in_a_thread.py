"""Converts in a thread, and gives up after some seconds: cancel_in_a_thread.py SOURCE TARGET SECONDS"""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import lamina

stop = threading.Event()
with ThreadPoolExecutor() as pool:
    future = pool.submit(lamina.convert, sys.argv[1], sys.argv[2], "raw", format="qcow2", cancel=stop)
    try:
        print(f"complete: {future.result(timeout=float(sys.argv[3])).size} bytes")
    except TimeoutError:
        stop.set()
        print(f"given up: {type(future.exception()).__name__}")
