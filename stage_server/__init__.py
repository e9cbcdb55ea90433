"""One stage of the model and the server around it.

This room knows torch and gRPC. It knows no directory and no other stage beyond "upstream" and "downstream".
"""
