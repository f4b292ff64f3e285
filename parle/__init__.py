"""Parle: replicas of one network, trained in parallel and coupled once a round. What both programs share."""
