"""`ds4 batch`: a file of requests in, a file of answers out, in OpenAI's batch format.

lines.py    the requests of IN.jsonl, and answers as lines of OUT.jsonl
journal.py  OUT.jsonl: append-only, synced, and read again to go on after a kill
answer.py   one request through the server's own endpoints, without a socket
run.py      keeps a worker full until all is answered
cluster.py  the same with workers on the hosts of a Ray cluster
"""
