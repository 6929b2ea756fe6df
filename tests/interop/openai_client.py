"""The official openai client against `pare serve`: whole and streamed answers, errors, many clients at once.

    openai_client.py PROGRAM [--seconds 10] [--clients 32]
"""
import argparse
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time

import openai

from served import Served, chat_model

TEACHER = pathlib.Path(__file__).resolve().parents[2] / "examples" / "teacher"
PROMPT = "add_library\n-----------\n\nAdd a library to the project"


def client_of(server, retries=0):
    return openai.OpenAI(base_url=server.url, api_key="none", max_retries=retries, timeout=60)


def check_answers(client):
    names = [model.id for model in client.models.list()]
    assert names == ["chat"] and client.models.retrieve("chat").id == "chat", names
    ask = dict(model="chat", prompt=PROMPT, max_tokens=40, temperature=0, logprobs=2)
    whole = client.completions.create(**ask)
    choice = whole.choices[0]
    assert whole.usage.completion_tokens == len(choice.logprobs.tokens) == 40 and choice.finish_reason == "length"
    assert "".join(choice.logprobs.tokens) == choice.text
    scores = choice.logprobs
    assert all(value == max(top.values()) for value, top in zip(scores.token_logprobs, scores.top_logprobs))
    pieces = list(client.completions.create(stream=True, stream_options={"include_usage": True}, **ask))
    assert "".join(piece.choices[0].text for piece in pieces[:-1]) == choice.text
    assert pieces[-1].usage == whole.usage and pieces[-2].choices[0].finish_reason == "length"
    echoed = client.completions.create(echo=True, **{**ask, "max_tokens": 0})
    assert echoed.choices[0].text == PROMPT and echoed.choices[0].logprobs.token_logprobs[0] is None
    several = client.completions.create(model="chat", prompt=["add", "find_package"], max_tokens=5, temperature=0)
    assert [c.index for c in several.choices] == [0, 1]
    assert several.choices[0].text == client.completions.create(
        model="chat", prompt="add", max_tokens=5, temperature=0).choices[0].text
    cut = client.completions.create(stop=choice.text[20:24], **ask)
    assert cut.choices[0].text == choice.text[:choice.text.index(choice.text[20:24])]
    assert cut.choices[0].finish_reason == "stop"


def check_chat(client):
    messages = [{"role": "system", "content": "Write a manual."}, {"role": "user", "content": "What is add_library?"}]
    ask = dict(model="chat", messages=messages, max_tokens=30, seed=5, temperature=0.8, logprobs=True, top_logprobs=3)
    whole = client.chat.completions.create(**ask)
    message = whole.choices[0].message
    assert message.role == "assistant" and len(whole.choices[0].logprobs.content) == whole.usage.completion_tokens
    assert bytes(b for t in whole.choices[0].logprobs.content for b in t.bytes).decode() == message.content
    pieces = list(client.chat.completions.create(stream=True, **ask))
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == message.content
    assert pieces[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    del ask["logprobs"], ask["top_logprobs"]
    with client.chat.completions.stream(**ask) as stream:
        assert "".join(event.delta for event in stream if event.type == "content.delta") == message.content
    # The next turn, with the client's own object of the answer and with all of its fields, null or not.
    turns = []
    for answer in (message, message.model_dump(), {"role": "assistant", "content": message.content}):
        ask["messages"] = [*messages, answer, {"role": "user", "content": "And add_executable?"}]
        turns.append(client.chat.completions.create(**ask).choices[0].message.content)
    assert turns[0] == turns[1] == turns[2], turns


def refused(kind, status, call, **ask):
    try:
        call(**ask)
    except kind as problem:
        assert problem.status_code == status, problem
        assert problem.body["message"], problem.body
        return problem
    raise AssertionError(f"not refused: {ask}")


def check_errors(client):
    create = client.completions.create
    refused(openai.NotFoundError, 404, create, model="gpt-4", prompt="x")
    assert refused(openai.BadRequestError, 400, create, model="chat", prompt="x", n=2).body["param"] == "n"
    refused(openai.BadRequestError, 400, create, model="chat", prompt=[5] * 600)
    refused(openai.BadRequestError, 400, create, model="chat", prompt="x", extra_body={"top_k": 5})
    refused(openai.APIStatusError, 413, create, model="chat", prompt="x" * 300000)
    refused(openai.NotFoundError, 404, client.embeddings.create, model="chat", input="x")


def check_full_queue(program, model):
    with Served(program, model, "--name", "chat", "--parallel", "1", "--queue", "0") as server:
        client = client_of(server)
        stream = client.completions.create(model="chat", prompt=PROMPT, max_tokens=400, logprobs=20, stream=True)
        statuses = set()
        for _ in range(200):  # somewhere in it the first one is still being answered
            try:
                client.completions.create(model="chat", prompt="x", max_tokens=1)
                break
            except openai.RateLimitError as problem:
                assert problem.response.headers["Retry-After"] == "1"
                statuses.add(problem.status_code)
        stream.close()
        assert statuses == {429}, statuses
        patient = client_of(server, retries=5)  # the client's own retries get through
        assert patient.completions.create(model="chat", prompt="x", max_tokens=1).usage.completion_tokens == 1


def check_many(server, clients, seconds):
    """No error, the answer that each prompt has alone, fair shares, memory that stays."""
    prompts = [f"{PROMPT} number {i}" for i in range(clients)]
    want = [client_of(server).completions.create(model="chat", prompt=p, max_tokens=24, temperature=0).choices[0].text
            for p in prompts]
    own = [client_of(server) for _ in prompts]
    counts, problems = [0] * clients, []

    def work(i, end):
        ask = dict(model="chat", prompt=prompts[i], max_tokens=24, temperature=0)
        while time.monotonic() < end or (sum(counts) < 6 * clients and time.monotonic() < end + 20 * seconds):
            try:
                if (i + counts[i]) % 2:
                    got = own[i].completions.create(**ask).choices[0].text
                else:
                    got = "".join(p.choices[0].text for p in own[i].completions.create(stream=True, **ask))
                if got != want[i]:
                    problems.append(f"client {i}: {got!r}, not {want[i]!r}")
            except Exception as problem:
                problems.append(f"client {i}: {problem!r}")
            counts[i] += 1

    def run(duration):
        threads = [threading.Thread(target=work, args=(i, time.monotonic() + duration)) for i in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    run(seconds / 3)  # buffers grow to their sizes
    before, counts[:] = server.memory(), [0] * clients
    run(seconds)
    after = server.memory()
    assert not problems, problems[:3]
    print(f"  {clients} clients: {sum(counts)} answers, {min(counts)} to {max(counts)} a client; "
          f"memory {before[0] / 2**20:.1f} -> {after[0] / 2**20:.1f} MiB, {after[1]} threads; "
          f"at most {server.health()['most_together']} sequences in a pass")
    assert min(counts) >= 0.5 * max(counts) - 1, counts
    assert after[0] <= 1.05 * before[0] + 2**20, (before, after)
    assert server.health()["most_together"] > 1


def check_killed(server):
    code = ("import openai, sys\n"
            f"c = openai.OpenAI(base_url='{server.url}', api_key='x')\n"
            "for piece in c.completions.create(model='chat', prompt='add', max_tokens=500, logprobs=20, stream=True,"
            " extra_body={'temperature': 1.5}):\n"
            "    print('.', flush=True)\n")
    before = server.memory()
    for _ in range(5):
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert child.stdout.readline()
        child.send_signal(signal.SIGKILL)
        child.wait()
        server.wait_until_idle()
    after = server.memory()
    assert after[0] <= 1.05 * before[0] + 2**20, (before, after)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("program")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--clients", type=int, default=32)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = chat_model(given.program, TEACHER, pathlib.Path(folder) / "chat")
        with Served(given.program, model, "--parallel", "8", "--max-body", "200K") as server:
            client = client_of(server)
            for check in (check_answers, check_chat, check_errors):
                check(client)
                print("ok", check.__name__, flush=True)
            check_many(server, given.clients, given.seconds)
            print("ok check_many", flush=True)
            check_killed(server)
            print("ok check_killed", flush=True)
            assert server.stop() == 0
        check_full_queue(given.program, model)
        print("ok check_full_queue")


main()
