"""Features of pictures and texts, and what is nearest to what among them.

`embedding` makes them, shared by all hosts of a job; `neighbours` compares them on the devices.
"""
