"""What each verb of the command line does. These modules alone print."""
