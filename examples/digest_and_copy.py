"""An image as a file of the standard library: digest_and_copy.py IMAGE TARGET"""

import hashlib
import shutil
import sys

import lamina

with lamina.open(sys.argv[1], format="qcow2") as image, image.as_file() as file:
    print(hashlib.file_digest(file, "sha256").hexdigest())
    file.seek(0)
    with open(sys.argv[2], "wb") as target:
        shutil.copyfileobj(file, target, 1 << 20)
