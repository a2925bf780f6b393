"""Serves the bytes of an image to clients that send lines "OFFSET LENGTH": asyncio_server.py IMAGE SOCKET"""

import asyncio
import sys

import lamina.aio


async def main(path: str, socket: str) -> None:
    async with lamina.aio.open(path, format="qcow2") as image:

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while line := await reader.readline():
                offset, length = map(int, line.split())
                writer.write(await image.read(offset, length))
                await writer.drain()
            writer.close()

        async with await asyncio.start_unix_server(answer, socket) as server:
            print("ready", flush=True)
            await server.serve_forever()


asyncio.run(main(sys.argv[1], sys.argv[2]))
