# The demo: a character model of English prose about Python, trained for four minutes. The recipe is
# train.py's own, the network what fits the machine.
{
    "data": "data/pydocs",
    "out_dir": "out/pydocs",
    "max_minutes": 4,
}
