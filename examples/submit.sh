#!/usr/bin/env bash
# Submit a task from a shell and act on how it ended. Start a cluster first: rocyard up.
set -euo pipefail

id=$(rocyard submit --memory 24GiB --time-limit 1m sleep '{"seconds": 2}')
echo "task $id"
rocyard explain "$id"

if result=$(rocyard submit --memory 1GiB --wait --timeout 60s echo '{"x": 1}'); then
  echo "the result is $result"
else
  case $? in
    1) echo "it failed" ;;
    6) echo "it takes longer than a minute" ;;
    7) echo "no device could hold it, or a limit is reached" ;;
    *) echo "it could not be submitted" ;;
  esac
fi
