"""What labels are worth against ground truth, for `data_prep.label_quality` alone.

truth    what each picture shows and its caption names, as files say
counts   right and wrong labels: in all, by kind and size of the entity, by kind of caption
picture  precision over recall and the calibration, drawn
"""
