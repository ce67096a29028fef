"""Runs every example workflow of `comfyui/` in a real ComfyUI server, over HTTP as its page does.

    COMFYUI_DIR=/path/to/ComfyUI make test-comfyui

The server is started from the checkout with a separate base directory, which has the node pack as a custom node, so
nothing is written into the checkout. COMFYUI_PYTHON names the Python that has ComfyUI's requirements and ours; it
also runs this script. Every workflow must end without an error and give images, its progress bars must end full, and
previews must arrive. Then come an interruption, and a LoRA file that is replaced between runs. Writes
`benchmarks/results/cpu/comfyui.json`.
"""

import argparse
import asyncio
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
from PIL import Image
from safetensors.torch import load_file, save_file

from benchmarks.harness import RESULTS, environment, write_results
from diffusers_sana import SANA_EMOJI_PIXEL_ART


ROOT = Path(__file__).parents[1]
PACK, WORKFLOWS = ROOT / "comfyui", sorted((ROOT / "comfyui" / "example_workflows").glob("*.json"))
FOLDER = "sana"  # of the pack, in custom_nodes
WIDGETS = ("COMBO", "STRING", "INT", "FLOAT", "BOOLEAN")
PREVIEW_EVENTS = (1, 4)  # of ComfyUI's binary messages: with an image, with an image and metadata
Prompt = dict[str, dict[str, Any]]


def to_prompt(workflow: dict[str, Any]) -> Prompt:
    """A saved workflow as the page sends it to the server: nodes by id, with their inputs by name."""
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        values, inputs = iter(node["widgets_values"]), {}
        for declared in node["inputs"]:
            if "widget" in declared:
                inputs[declared["name"]] = next(values)
                if declared["name"] == "seed":
                    next(values)  # what the page does with the seed after a run
            if declared["link"] is not None:
                inputs[declared["name"]] = links[declared["link"]]
        if rest := list(values):
            raise ValueError(f"node {node['id']} ({node['type']}) has values without an input: {rest}")
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


class Client:
    """A page of the server.

    Attributes:
        log: what every run gave, by name.
    """

    def __init__(self, session: aiohttp.ClientSession, url: str, id: str, socket: Any) -> None:
        self.session, self.url, self.id, self.socket = session, url, id, socket
        self.log: dict[str, Any] = {}

    async def get(self, path: str, **query: str) -> Any:
        """JSON of a page; other content as bytes."""
        async with self.session.get(self.url + path, params=query) as response:
            response.raise_for_status()
            return await (response.json() if response.content_type == "application/json" else response.read())

    async def post(self, path: str, content: dict[str, Any]) -> Any:
        async with self.session.post(self.url + path, json=content) as response:
            text = await response.text()
            if response.status != 200:
                raise RuntimeError(f"{path}: {response.status} {text}")
            return json.loads(text) if text else None

    async def run(self, name: str, prompt: Prompt, interrupt: bool = False) -> dict[str, Any]:
        """Runs a prompt to its end, or with `interrupt` until it has made a step, and logs it.

        Raises:
            RuntimeError: the server refuses the prompt, or a node fails.
        """
        start = time.perf_counter()
        id = (await self.post("/prompt", {"prompt": prompt, "client_id": self.id}))["prompt_id"]
        bars: dict[str, tuple[int, int]] = {}
        entry: dict[str, Any] = {"previews": 0, "from_cache": []}
        while True:
            message = await asyncio.wait_for(self.socket.receive(), timeout=900)
            if message.type == aiohttp.WSMsgType.BINARY:
                entry["previews"] += int.from_bytes(message.data[:4], "big") in PREVIEW_EVENTS
                continue
            if message.type != aiohttp.WSMsgType.TEXT:
                raise RuntimeError(f"{name}: the connection ended ({message.type})")
            event, data = (content := json.loads(message.data))["type"], content["data"]
            if data.get("prompt_id") != id:
                continue
            if event == "progress":
                bars[data["node"]] = (data["value"], data["max"])
                if interrupt:
                    interrupt = False
                    await self.post("/interrupt", {})
            elif event == "execution_cached":
                entry["from_cache"] = sorted(prompt[node]["class_type"] for node in data["nodes"])
            elif event == "execution_interrupted":
                entry["interrupted"] = True
            elif event == "execution_error":
                raise RuntimeError(f"{name}: {data['node_type']}: {data['exception_message']}\n{data['traceback']}")
            elif event == "executing" and data["node"] is None:
                break
        seconds = time.perf_counter() - start
        print(
            f"{name}: {seconds:.0f} s, previews: {entry['previews']}, from the cache: {entry['from_cache']}",
            flush=True,
        )
        entry["progress"] = {f"{prompt[node]['class_type']} {node}": list(bar) for node, bar in bars.items()}
        self.log[name] = entry
        return entry | {"outputs": (await self.get(f"/history/{id}"))[id]["outputs"]}

    async def images(self, run: dict[str, Any]) -> dict[str, Image.Image]:
        """The saved images of a run, by the number of their node and place; in this order, not in that of the run."""
        images = {}
        for node, output in sorted(run["outputs"].items()):
            for i, file in enumerate(output.get("images", [])):
                data = await self.get("/view", **file)
                images[f"{node}.{i}"] = Image.open(io.BytesIO(data)).convert("RGB")
        return images


@asynccontextmanager
async def running_server(checkout: Path, base: Path) -> AsyncIterator[tuple[Client, Path]]:
    """A server with the pack, and a client of it; also the file with what the server prints."""
    for folder in ("custom_nodes", "input", "models/loras", "models/diffusers", "models/controlnet", "user"):
        (base / folder).mkdir(parents=True)
    shutil.copytree(PACK, base / "custom_nodes" / FOLDER)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = base / "server.log"
    options = ["--cpu", "--port", str(port), "--base-directory", str(base), "--preview-method", "latent2rgb"]
    options += ["--database-url", "sqlite:///:memory:", "--disable-api-nodes", "--disable-auto-launch"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "main.py", *options],
            cwd=checkout,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        )
    try:
        url, id = f"http://127.0.0.1:{port}", uuid.uuid4().hex
        async with aiohttp.ClientSession() as session:
            while True:
                try:
                    async with session.get(url + "/system_stats"):
                        break
                except aiohttp.ClientConnectionError:
                    if process.poll() is not None:
                        text = log.read_text(encoding="utf-8")
                        raise RuntimeError(f"the server has ended:\n{text[-4000:]}") from None
                    await asyncio.sleep(1)
            async with session.ws_connect(f"{url}/ws", params={"clientId": id}, max_msg_size=0) as socket_:
                yield Client(session, url, id, socket_), log
    finally:
        process.terminate()
        process.wait(timeout=60)


async def check_pack(client: Client, log: Path) -> dict[str, Any]:
    """What ComfyUI shows of the pack before anything runs."""
    info = await client.get("/object_info")
    nodes = sorted(name for name, node in info.items() if node["python_module"] == f"custom_nodes.{FOLDER}")
    assert nodes, "ComfyUI has none of our nodes"
    for name in nodes:
        assert info[name]["description"], f"{name} has no description"
        assert await client.get(f"/extensions/{FOLDER}/docs/{name}.md"), f"{name} has no help page"
    templates = await client.get("/workflow_templates")
    assert sorted(templates[FOLDER]) == [path.stem for path in WORKFLOWS]
    for name in templates[FOLDER]:
        assert await client.get(f"/api/workflow_templates/{FOLDER}/{name}.json")
    seconds = re.findall(rf"([\d.]+) seconds: \S*/{FOLDER}\s", log.read_text(encoding="utf-8"))
    return {"nodes": nodes, "import_seconds": float(seconds[0])}


async def check_workflows(client: Client) -> None:
    """Every example runs and gives what it promises."""
    for path in WORKFLOWS:
        run = await client.run(path.stem, to_prompt(json.loads(path.read_text(encoding="utf-8"))))
        entry, images = client.log[path.stem], await client.images(run)
        entry["images"] = {place: list(image.size) for place, image in images.items()}
        entry["text"] = [text for output in run["outputs"].values() for text in output.get("text", [])]
        assert images
        assert all(
            min(image.convert("L").getextrema()) < max(image.convert("L").getextrema()) for image in images.values()
        )
        assert run["progress"]
        assert all(value == total for value, total in run["progress"].values()), run["progress"]
        assert run["previews"] > 0, f"{path.stem}: no previews"


async def check_interruption(client: Client) -> None:
    """It ends the run at the next step, and the run after it is as one before."""
    workflow = json.loads((PACK / "example_workflows" / "text_to_image.json").read_text(encoding="utf-8"))
    runs: list[dict[str, Image.Image]] = []
    for name, changes in (
        ("before interruption", {"seed": 5}),
        ("interrupted", {"seed": 6, "steps": 200}),
        ("after interruption", {"seed": 5}),
    ):
        if name == "after interruption":  # the default size in figures: an image that is in no cache of ComfyUI's
            changes |= dict(zip(("width", "height"), next(iter(runs[0].values())).size, strict=True))
        prompt = to_prompt(workflow)
        next(node for node in prompt.values() if node["class_type"] == "SanaSample")["inputs"] |= changes
        run = await client.run(name, prompt, interrupt="steps" in changes)
        runs.append(await client.images(run))
    before, during, after = runs
    assert not during
    assert client.log["interrupted"]["interrupted"]
    ((done, steps),) = client.log["interrupted"]["progress"].values()
    assert done < steps / 4  # how many depends on the machine: it is asked after the first
    assert "SanaSample" not in client.log["after interruption"]["from_cache"]
    assert {place: image.tobytes() for place, image in before.items()} == {
        place: image.tobytes() for place, image in after.items()
    }


async def check_replaced_lora(client: Client, base: Path) -> None:
    """A file that has changed is read again; one that has not comes from the cache."""
    workflow = json.loads((PACK / "example_workflows" / "lora.json").read_text(encoding="utf-8"))
    weights = load_file(next(Path(SANA_EMOJI_PIXEL_ART).glob("*.safetensors")))
    file = base / "models" / "loras" / "trained.safetensors"
    images = []
    for name, scale in (("LoRA", 1.0), ("LoRA unchanged", None), ("LoRA replaced", 0.0)):
        if scale is not None:
            save_file({key: tensor * scale for key, tensor in weights.items()}, file)
        prompt = to_prompt(workflow)
        next(node for node in prompt.values() if node["class_type"] == "SanaLora")["inputs"]["lora"] = file.name
        run = await client.run(name, prompt)
        images.append(await client.images(run))
    assert "SanaLora" in client.log["LoRA unchanged"]["from_cache"]
    assert "SanaLora" not in client.log["LoRA replaced"]["from_cache"]
    assert client.log["LoRA replaced"]["from_cache"].count("SanaSample") == 1  # the branch without the LoRA
    (with_lora, without), (with_zeros, _) = (list(run.values()) for run in (images[0], images[2]))
    assert with_lora.tobytes() != without.tobytes()
    difference = max(abs(a - b) for a, b in zip(with_zeros.tobytes(), without.tobytes(), strict=True))
    assert difference <= 2, f"a LoRA of zeros changes values by {difference}"


async def check(checkout: Path, base: Path) -> dict[str, Any]:
    """Everything; the results."""
    async with running_server(checkout, base) as (client, log):
        try:
            pack = await check_pack(client, log)
            await check_workflows(client)
            await check_interruption(client)
            await check_replaced_lora(client, base)
        except BaseException:
            print(log.read_text(encoding="utf-8")[-6000:], file=sys.stderr)
            raise
    return pack | {"runs": client.log}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder (default: benchmarks/results)")
    arguments = parser.parse_args()
    checkout = Path(os.environ.get("COMFYUI_DIR", ""))
    if not (checkout / "comfyui_version.py").is_file():
        parser.error("COMFYUI_DIR must name a checkout of ComfyUI, with comfyui_version.py in it")
    version = re.search(r'"(.+)"', (checkout / "comfyui_version.py").read_text(encoding="utf-8"))[1]
    report = environment()
    report["command"] = "COMFYUI_DIR=... make test-comfyui"
    report["versions"]["comfyui"] = version
    with tempfile.TemporaryDirectory() as folder:
        report |= asyncio.run(check(checkout.resolve(), Path(folder)))
    print(
        f"ComfyUI {version}: {len(report['runs'])} runs passed; {write_results('comfyui', report, arguments.results)}"
    )


if __name__ == "__main__":
    main()
