// The Python module kdcmae_fast._C. Importing it loads the library, whose static initialisers
// register the operators with torch (TORCH_LIBRARY_IMPL in csrc/cpu/*.cpp); it holds nothing else.

#include <Python.h>

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", "Compiled kdcmae_fast operators.", -1, nullptr,
  };
  return PyModule_Create(&module);
}
