"""Submit tasks from Python: one, many, and one that fails. Start a cluster first: rocyard up."""

import rocyard


def main() -> None:
    with rocyard.Client() as client:
        print("one task:", client.submit("echo", {"hello": "world"}, memory="2GiB").result(60))

        squares = client.submit_many(rocyard.task_request("echo", {"n": n, "square": n * n}) for n in range(20))
        print("many:", sum(task.result(60)["square"] for task in squares))

        try:
            client.submit("fail", {"message": "on purpose"}).result(60)
        except rocyard.TaskFailed as failure:
            print("a failure:", failure.type, failure.message)

        try:
            client.submit("echo", memory="900TiB")
        except rocyard.Infeasible as refusal:
            print("refused:", refusal)


if __name__ == "__main__":
    main()
