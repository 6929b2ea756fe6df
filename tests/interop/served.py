"""`pare serve` as a process, for the clients that drive it."""
import json
import pathlib
import re
import signal
import subprocess
import time
import urllib.request


class Served:
    """with Served(program, model, "--parallel", "8") as server: server.url, server.memory(), server.health()"""

    def __init__(self, program, model, *options):
        self.command = [program, "serve", str(model), "--port", "0", "--quiet", *options]

    def __enter__(self):
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, text=True)
        line = self.process.stdout.readline()
        self.url = re.search(r"http://\S+/v1", line).group()
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.stop()

    def stop(self, number=signal.SIGTERM):
        """The exit code."""
        self.process.send_signal(number)
        return self.process.wait(60)

    def memory(self):
        """Resident bytes that are not pages of files, and threads."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        number = lambda key: int(re.search(rf"{key}:\s+(\d+)", status).group(1))
        return number("RssAnon") * 1024, number("Threads")

    def health(self):
        with urllib.request.urlopen(self.url.removesuffix("/v1") + "/health") as answer:
            return json.load(answer)

    def wait_until_idle(self, seconds=20):
        end = time.monotonic() + seconds
        while (health := self.health())["running"] + health["waiting"] > 0:
            assert time.monotonic() < end, health
            time.sleep(0.02)
        return health


def export(program, folder, out, *options):
    subprocess.run([program, "export", "--quiet", str(folder), "--to", "compact", "--out", str(out), *options],
                   check=True, stdout=subprocess.DEVNULL)
    return out


def chat_model(program, teacher, folder):
    """The tiny teacher with a chat template, in four bits."""
    folder.mkdir()
    for file in teacher.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return export(program, folder, folder / "chat.pare", "--codec", "q4")
