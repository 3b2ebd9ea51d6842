"""Of all entities a caption may mean, those that the picture shows. links/ -> labels/.

choose     the stage and the decision
admissible entities that are no labels, whatever a picture shows
embed      pictures and entity texts through a CLIP model: the one part that runs a model
twins      pictures that look the same count once
z_scores   how far a picture stands out for an entity beside all other pictures
senses     what a name means: pictures of an entity's kin speak for it
visibility whether a picture shows an entity, as a probability
"""
